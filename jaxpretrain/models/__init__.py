"""Networks: one file per paper, blocks they share in `layers/`."""
