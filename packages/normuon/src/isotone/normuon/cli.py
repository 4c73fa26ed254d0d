def main():
    print("stub")


app = main
