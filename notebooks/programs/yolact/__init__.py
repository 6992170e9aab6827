"""What `train_yolact.py` is made of: data, augmentation, matching, losses, and the measure of what a network finds.

scenes       images of Fashion-MNIST items with exact masks, made when they are asked for
sprites      what they are painted with
coco         annotations of your own images in COCO's format
datasets     either of them, for training
augmentation scenes changed at random, and their truth with them
matching     which anchor learns which object
losses       what training minimizes
finetuning   the weights to start from
evaluation   what a network finds, in PyTorch
"""
