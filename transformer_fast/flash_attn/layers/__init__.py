"""Stands where flash-attn has its layers: the rotary position embedding."""
