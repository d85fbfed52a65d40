"""Object detection and instance segmentation: a pre-trained backbone under torchvision's Faster or Mask R-CNN."""
