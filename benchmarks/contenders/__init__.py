"""Programs that train the same model on the same batches, each in a process of its own."""
