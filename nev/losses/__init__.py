"""Contrastive losses over all ranks of a run. torch only: no Ray, no data, no model."""
