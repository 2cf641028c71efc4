"""The content of one sample: decoding, cropping, alt texts, captions that are none."""
