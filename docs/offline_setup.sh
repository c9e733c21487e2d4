# Sourced in the checkout on a machine without a network: unpacks what has arrived in .gpu/, and says where it is.
mkdir -p data/cifar10 data/wikitext-2
for archive in .gpu/*/cifar-*.tar.xz; do
    [ -e "$archive" ] && tar -C data/cifar10 -xJf "$archive" && rm "$archive"
done
for archive in .gpu/*/wikitext-2.tar.xz; do
    [ -e "$archive" ] && tar -C data/wikitext-2 -xJf "$archive" && rm "$archive"
done
for wheel in .gpu/*/*.whl; do
    [ -e "$wheel" ] && python3 -m pip install -q --no-index --no-deps --upgrade --target .gpu/packages "$wheel" && rm "$wheel"
done
export PYTHONPATH="$PWD/.gpu/packages" PYTHONUNBUFFERED=1
export ARS2_CIFAR10_ROOT="$PWD/data/cifar10" ARS2_WIKITEXT2_ROOT="$PWD/data/wikitext-2"
