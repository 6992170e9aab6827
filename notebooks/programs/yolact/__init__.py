"""The parts of `train_yolact.py`: data, augmentation, matching, losses, and the evaluation of a network.

scenes       images of Fashion-MNIST items with exact masks, made on request
sprites      what they are painted with
coco         annotations of your own images in COCO's format
datasets     either of them, for training
augmentation random changes of scenes and of their truth
matching     which anchor learns which object
losses       what training minimizes
finetuning   the weights to start from
evaluation   what a network finds, in PyTorch
"""
