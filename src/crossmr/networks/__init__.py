"""What is learnt: the three networks, the model that they make, and inference from arrays to arrays."""
