"""From a prepared dataset to a model: stages, batches, and the loop that trains each network."""
