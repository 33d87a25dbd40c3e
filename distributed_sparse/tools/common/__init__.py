"""What a long run leaves behind: finished units, tables and plots."""
