"""Images with labels and captions to train on and to measure against; numpy only."""

from edgedistill.data.dataset import ImageDataset as ImageDataset
from edgedistill.data.dataset import Images as Images
from edgedistill.data.digits import load_digits as load_digits
from edgedistill.data.sources import open_dataset as open_dataset
