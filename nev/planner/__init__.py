"""What a run takes before it starts: time, cost, what bounds it, and how far it scales. Numbers in, numbers out.

No torch at import, no Ray, no network. `workload.py` alone opens a config's model, on tensors without memory.
"""
