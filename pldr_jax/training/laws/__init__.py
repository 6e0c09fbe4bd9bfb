"""How a run trains: learning rates, groups of parameters, which targets count."""
