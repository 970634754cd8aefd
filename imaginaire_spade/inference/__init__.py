"""Generate image files from a checkpoint and label maps.

Responsible for the way of a label map through a trained generator: padding and cropping, style codes, batches of one
size, writing, the split over processes, and the gallery page. Needs no photos, no discriminator and no loss network.

An image is a function of the checkpoint, the seed and the label map's key: neither batch size, nor order, nor the
number of processes changes it (on a GPU up to the rounding of its kernels; on a CPU label maps go through the
generator one by one, which costs nothing there and makes files equal bit by bit).

``model``: checkpoint -> generator; ``sizes``: at which size a label map is generated; ``style``: style codes;
``synthesis``: label maps -> images; ``folder``: a data set -> a folder of image files; ``synthesizer``: one label map
at a time, in Python. Each imports only those before.
"""
