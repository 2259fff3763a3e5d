"""The methods of the papers, one module each, by family: pure functions, no input or output, no plotting."""
