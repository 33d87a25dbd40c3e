"""The command lines: each module parses, calls the library and prints. `distributed-sparse NAME` and `launch/` run them."""
