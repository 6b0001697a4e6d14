"""What ``pretrained=True`` loads: where weights are found, how they are read, and how they come to fit our networks."""
