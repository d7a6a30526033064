"""Stands where flash-attn has its operations: what models import beside attention."""
