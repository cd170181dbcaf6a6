"""Networks that classify cutouts: fitted as published, pre-trained on galaxies, compared in studies."""
