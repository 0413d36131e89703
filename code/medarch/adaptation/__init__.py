"""Adapting a trained model: for any ``nn.Module``, whatever it computes. Names are imported from their modules."""
