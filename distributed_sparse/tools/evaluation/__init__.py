"""Tasks that tell whether a sparse method still finds what the answer needs."""
