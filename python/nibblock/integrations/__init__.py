"""Bridges to other libraries, imported on demand: `import nibblock` loads none of them."""
