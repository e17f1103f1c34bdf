"""The native kernels. One module per kernel; see the .pyi beside each for its interface."""
