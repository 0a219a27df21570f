"""Nets that test one image or a group of images in one forward pass. Knows neither Ray nor storage."""
