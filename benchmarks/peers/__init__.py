"""backdrift's gradient methods beside other packages' on the same work (see ``__main__``)."""
