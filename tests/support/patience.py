"""How long tests wait for what must happen."""

WAIT_S = 300.0
"""Seconds. A bound for hangs and no measure of speed: a busy machine may take minutes for what an idle one does at once."""
