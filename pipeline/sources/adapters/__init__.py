"""One file for each data set or generic layout."""
