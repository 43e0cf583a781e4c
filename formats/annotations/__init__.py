"""COCO, Pascal VOC and YOLO annotations, read into one table."""
