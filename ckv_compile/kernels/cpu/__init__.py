"""C++ for what neither PyTorch's ops nor code generated from them do well on a CPU."""
