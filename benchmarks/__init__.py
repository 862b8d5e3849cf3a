"""What the tables of the README and of the model card are made of."""
