"""Score: what the numbers mean, with pycocotools as the reference."""
