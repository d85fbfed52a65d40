"""What the papers claim, tried on two cores: the runs (``runs``), and the page that shows them (``page``)."""
