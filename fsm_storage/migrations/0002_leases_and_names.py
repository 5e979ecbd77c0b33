import django.db.models.functions.datetime
from django.db import migrations, models


class Migration(migrations.Migration):

    dependencies = [
        ('fsm_storage', '0001_initial'),
    ]

    operations = [
        migrations.AlterField(
            model_name='fsmtransition',
            name='source',
            field=models.CharField(choices=[('bot', 'bot'), ('admin', 'admin'), ('expiry', 'expiry'), ('import', 'import'), ('migration', 'migration'), ('move', 'chat moved'), ('mirror', 'mirror')], default='bot', max_length=10, verbose_name='source'),
        ),
        migrations.CreateModel(
            name='FSMLease',
            fields=[
                ('id', models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name='ID')),
                ('alias', models.CharField(max_length=63, verbose_name='storage')),
                ('key', models.CharField(max_length=512, verbose_name='key')),
                ('owner', models.CharField(max_length=63, verbose_name='owner')),
                ('token', models.BigIntegerField(verbose_name='token')),
                ('expires_at', models.DateTimeField(verbose_name='expires at')),
            ],
            options={
                'verbose_name': 'lease',
                'verbose_name_plural': 'leases',
                'db_table': 'fsm_storage_lease',
                'default_permissions': ('view',),
                'constraints': [models.UniqueConstraint(fields=('alias', 'key'), name='fsm_storage_lease_key')],
            },
        ),
        migrations.CreateModel(
            name='FSMPeer',
            fields=[
                ('peer_id', models.BigIntegerField(primary_key=True, serialize=False, verbose_name='id')),
                ('title', models.CharField(blank=True, db_default='', default='', max_length=255, verbose_name='title')),
                ('username', models.CharField(blank=True, db_default='', default='', max_length=255, verbose_name='user name')),
                ('updated_at', models.DateTimeField(db_default=django.db.models.functions.datetime.Now(), verbose_name='last change')),
            ],
            options={
                'verbose_name': 'name',
                'verbose_name_plural': 'names',
                'db_table': 'fsm_storage_peer',
                'default_permissions': ('view',),
                'indexes': [models.Index(fields=['username'], name='fsm_storage_peer_username'), models.Index(fields=['title'], name='fsm_storage_peer_title')],
            },
        ),
    ]
