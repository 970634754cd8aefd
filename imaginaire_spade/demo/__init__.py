"""The painting page: paint label maps in a browser and see the generated image.

``service``: what the page can ask for, and the limits of a request; ``server``: HTTP around it; ``page/``: the page
itself. ``python -m imaginaire_spade.demo --checkpoint P`` starts it. Nothing but the standard library serves.
"""
