"""Predictions of the kernels' times without a card: machine code, and a model of one multiprocessor."""
