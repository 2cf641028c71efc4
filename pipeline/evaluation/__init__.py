"""Measure pictures: against other pictures, against their captions, and by what a detector finds in them."""
