"""The networks' architectures: one self-contained file each, with its source and licence at the top."""
