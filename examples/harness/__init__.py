"""What the example of a whole training run is made of: its model, its text, its loop and its tables."""
