"""What a run of train.py leaves in its out_dir beside its checkpoints: log.csv, loss.png and experts.png."""
import csv

from matplotlib.figure import Figure

from lory import atomic_open


def write_log(path, rows):
    """Rows are dicts, and the columns are all their keys."""
    with atomic_open(path, 'w', newline='', encoding='utf-8') as f:
        writer = csv.DictWriter(f, dict.fromkeys(name for row in rows for name in row))
        writer.writeheader()
        writer.writerows(rows)


def plot(out_dir, rows, domains, routing):
    """loss.png from the log's rows; experts.png, as in Fig. 6, of routing (n_domains, n_layer, E), if any."""
    plot_loss(rows, domains).savefig(f'{out_dir}/loss.png', dpi=110)
    if routing is not None:
        plot_routing(routing, domains).savefig(f'{out_dir}/experts.png', dpi=110)


def plot_loss(rows, domains):
    """Bits per byte by step: of training, of each domain's validation and of their mean."""
    columns = {'bpb': 'training', 'val_bpb': 'mean of domains'} | {f'bpb_{name}': name for name in domains}
    fig = Figure(figsize=(8, 4.5), layout='constrained')
    ax = fig.subplots()
    for column, label in columns.items():
        points = [(row['step'], row[column]) for row in rows if column in row]
        ax.plot([step for step, _ in points], [bpb for _, bpb in points], '.-', label=label)
    first = next(row['val_bpb'] for row in rows if 'val_bpb' in row)  # training begins far above
    ax.set(xlabel='step', ylabel='bits per byte', ylim=(None, 1.2 * first))
    ax.legend()
    return fig


def plot_routing(routing, domains):
    """For each layer, the mean routing weight of each expert on each domain's text."""
    n_layer, E = routing.shape[1:]
    fig = Figure(figsize=(1 + 3 * n_layer, 1.2 + 0.35 * len(domains)), layout='constrained')
    for layer, ax in enumerate(fig.subplots(1, n_layer, squeeze=False)[0]):
        image = ax.imshow(routing[:, layer], vmin=0, vmax=routing.max(), aspect='auto',
                          extent=(0.5, E + 0.5, len(domains) - 0.5, -0.5))  # experts from 1
        ax.set(title=f'layer {layer + 1}', xlabel='expert')
        ax.set_yticks(range(len(domains)), domains)
        ax.xaxis.get_major_locator().set_params(integer=True)
    fig.colorbar(image, ax=fig.axes, label='mean routing weight')
    return fig
