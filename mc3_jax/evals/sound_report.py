"""The page of a run that classifies sounds."""


def write(folder, content, probabilities, classes, names):
    return folder
