"""Backbones behind one contract: what is trained, its frozen parts and its noise process."""
