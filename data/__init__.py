"""Prepare: any label format in, a validated, versioned COCO dataset out."""
