"""One forward pass against KV-cached decoding: measured, printed and drawn."""
