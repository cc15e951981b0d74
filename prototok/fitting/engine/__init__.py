"""The engine behind every fit: rows and groups, slots on the device, the step, the loop."""
