"""Small weights: a model's products in 8 or 4 bits, rounded or calibrated on text."""
