"""The operations on a CPU in plain PyTorch, one file per operation; the operators in `fastalex.ops` check arguments."""
