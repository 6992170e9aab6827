"""What a notebook, benchmark or test needs beside the package: figures, formats side by side, clusters."""
