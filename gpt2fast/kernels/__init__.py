"""The compiled kernels: finding them, or building them."""
