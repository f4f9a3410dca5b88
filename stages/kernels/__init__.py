"""C++ for the CPU: the decoding step and the draw, and the attention of packed texts; built by the machine's own compiler."""
