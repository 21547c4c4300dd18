"""Random networks out of all the structures that people build, with random channels dead."""
