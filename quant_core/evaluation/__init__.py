"""What measures and shows the product: the demo, the ablations, and the benchmarks."""
