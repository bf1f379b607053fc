"""From a study, or a folder of them, to labelled synthetic volumes on its exact grid."""
